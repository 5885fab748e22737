"""The fleet's side of edge-runtime: enrols devices, plans rounds, sums up updates, publishes models, survives crashes."""
