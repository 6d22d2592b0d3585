"""Where clips come from: a folder of videos -> batches of uint8 frames and augmentation parameters. Knows nothing of torch.distributed."""
