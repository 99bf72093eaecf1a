"""From captions to hard negatives: tagging, masking, vocabulary, generators, validation."""
