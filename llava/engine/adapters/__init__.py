"""LoRA adapters beside their base model: read from folders, kept within bounds, chosen by each request."""
