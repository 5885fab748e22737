"""Simulation: many virtual devices on one machine under the real coordinator. The modules are imported by the CLI when it runs."""

ENGINES = ("local", "ray")  # where a simulation's trainings run
