"""A network to hand to others: rounded weights, pictures, a card, a program (docs/export.md)."""
