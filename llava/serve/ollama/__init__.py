"""The API of Ollama: chat, generate, and what clients ask of the models."""
