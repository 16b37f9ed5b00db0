"""What training would cost on devices that are not here."""
