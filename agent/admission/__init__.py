"""Admission: the destination decides how many guests may arrive at once. Begin with `slots.Slots`."""
