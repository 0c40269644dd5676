"""Hypervisor drivers behind one small interface: values in `base`, methods in `interface`, drivers in `libvirt` and `sim`.
Nothing outside this folder imports libvirt."""
