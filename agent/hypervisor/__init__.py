"""Hypervisor drivers behind one small interface (`base`): `libvirt` and `sim`. Nothing outside this room knows libvirt."""
