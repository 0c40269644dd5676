"""Conversion of the values of a hypervisor to and from the wire."""

import dataclasses

from agent.hypervisor.base import Domain, Features, Requirements
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.options import OPTIONS, Options, Support, Value
from agent.runtime.wire import duration
from drover.agent.v1 import host_pb2, options_pb2


def options_from_proto(message: options_pb2.Options) -> dict[str, Value]:
    """Return the options that the user chose. Their values have been checked with the request (`agent.service.bounds`)."""
    return {field.name: value for field, value in message.ListFields()}


def options_to_proto(options: Options) -> options_pb2.Options:
    return options_pb2.Options(**options)


def features_to_proto(features: Features) -> options_pb2.MigrationFeatures:
    return options_pb2.MigrationFeatures(
        options={name: _support_to_proto(support) for name, support in features.options.items() if not OPTIONS[name].blocked},
        uri_transports=features.uri_transports,
        bandwidth=features.bandwidth,
        split_phases=features.split_phases,
        first_port=features.ports[0],
        last_port=features.ports[1],
        bandwidth_unit=features.bandwidth_unit,
        reasons=features.reasons,
    )


def _support_to_proto(support: Support) -> options_pb2.OptionSupport.ValueType:
    shown = Support.SUPPORTED if support is Support.UNDONE else support
    return options_pb2.OptionSupport.Value(f"OPTION_SUPPORT_{shown.name}")


def domain_to_proto(domain: Domain) -> host_pb2.Domain:
    return host_pb2.Domain(
        name=domain.name,
        uuid=domain.uuid,
        state=host_pb2.DomainState.Value(f"DOMAIN_STATE_{domain.state.name}"),
        reason=domain.reason,
        memory_bytes=domain.memory_bytes,
        vcpus=domain.vcpus,
        persistent=domain.persistent,
        job=domain.job.value,
        silence=duration(domain.silent_for) if domain.silent_for else None,
        running_version=domain.running_version,
        installed_version=domain.installed_version,
        settings=settings_to_proto(domain.settings) if domain.settings is not None else None,
    )


def settings_to_proto(settings: GuestSettings) -> host_pb2.DomainSettings:
    return host_pb2.DomainSettings(
        tenant=settings.tenant,
        min_bandwidth_bytes_per_second=settings.min_bandwidth,
        max_bandwidth_bytes_per_second=settings.max_bandwidth,
    )


def settings_from_proto(message: host_pb2.DomainSettings) -> GuestSettings:
    return GuestSettings(message.tenant, message.min_bandwidth_bytes_per_second, message.max_bandwidth_bytes_per_second)


_REQUIREMENTS = tuple(field.name for field in dataclasses.fields(Requirements))
"""Field names, which are the same on the wire."""


def requirements_to_proto(requirements: Requirements) -> host_pb2.GuestRequirements:
    return host_pb2.GuestRequirements(**dataclasses.asdict(requirements))


def requirements_from_proto(message: host_pb2.GuestRequirements) -> Requirements:
    return Requirements(**{name: getattr(message, name) for name in _REQUIREMENTS})
