"""From a state to samples: seeds in, images out."""
