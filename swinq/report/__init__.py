"""What a calibration is worth: measured, judged and written as HTML, Markdown, JSON and CSV."""
