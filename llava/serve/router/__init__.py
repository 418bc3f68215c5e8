"""The original's protocol, and the controller: dispatch, forwarding, heartbeats."""
