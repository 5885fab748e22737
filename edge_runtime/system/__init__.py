"""The machine around the agent: what commonly goes wrong there, and the services that run on it."""
