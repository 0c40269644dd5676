"""Hypervisor drivers behind one small interface. Begin with `interface`. Nothing outside this folder imports libvirt.

base, interface    values and errors, and the methods that a driver must offer
options, features  the one table of options, and the checks that both ends support a migration
wire, reasons      conversion to and from the wire, and of a driver's errors to Drover's own
guest_fact         the last state of a guest that a hypervisor reported
names, events      rules for names of guests, and domain events for several consumers
libvirt, sim       the drivers
"""
