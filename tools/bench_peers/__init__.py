"""What runs inside the peers' own virtual environment: transformers, PEFT, Flower, matplotlib. Imports nothing of ours."""
