"""The server: ``http`` speaks OpenAI's protocol, ``engine`` runs the model; they meet in one protocol."""
