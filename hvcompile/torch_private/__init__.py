"""The one door to private torch: every name that torch does not document as public is used in here."""
