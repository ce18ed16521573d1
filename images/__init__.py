"""Images as uint8 tensors: image sets, and random changes of a batch."""
