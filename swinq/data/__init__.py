"""Images in: folders, zips, the embedded digits and fake data; exact sampling and transforms."""
