"""What a network is trained to predict (processes), samplers as plain functions, and classifier-free guidance."""
