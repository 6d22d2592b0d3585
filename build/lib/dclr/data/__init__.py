"""Data sets: from a folder of videos to batches of uint8 frames with augmentation parameters.

Nothing in this package uses torch.distributed.
"""
