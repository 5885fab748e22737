"""Answers for others: over HTTP with the newest model that is well, and over the fleet's broker."""
