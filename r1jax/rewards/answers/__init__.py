"""Final answers of mathematics: text to one notation (notation), to a typed value (reading), to a verdict (comparison)."""
