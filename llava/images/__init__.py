"""Images: opening them within limits, their tiles and features counted, pixels made."""
