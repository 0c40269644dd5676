"""Admission: a destination decides how many guests may arrive at once. Knows no handshake. Begin with `slots.Slots`."""
