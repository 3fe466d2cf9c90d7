"""What a study found: answers, charts, pages."""
