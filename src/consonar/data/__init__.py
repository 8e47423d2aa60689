"""Images and tokens: sources, transforms, token stores and batches. See docs/data.md."""
