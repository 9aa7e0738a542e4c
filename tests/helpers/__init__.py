"""Pieces that several test files share: small models, erasers, judges and data made by hand."""
