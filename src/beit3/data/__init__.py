"""From files to tensors: records, transforms, masks and the readers of public annotation files."""
