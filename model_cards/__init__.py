"""Installed as petra_zoo.model_cards: one card per published checkpoint; none is published yet."""
