"""What a conversion did and how good the result is, as data and as a table."""
