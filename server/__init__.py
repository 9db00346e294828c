"""The server: ``http`` speaks OpenAI's protocol, ``engine`` runs the model; neither knows the other's parts."""
