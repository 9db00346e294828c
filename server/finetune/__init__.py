"""Fine-tuning on the server's side: the command, the API's jobs, and the evaluation of what they make."""
