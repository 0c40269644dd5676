"""The scenarios on the simulated hypervisor."""

import pytest

from tests.scenarios.belongings import *  # noqa: F403 - the tests themselves
from tests.scenarios.changing import *  # noqa: F403 - the tests themselves
from tests.scenarios.documents import *  # noqa: F403 - the tests themselves
from tests.scenarios.limits import *  # noqa: F403 - the tests themselves
from tests.scenarios.migrating import *  # noqa: F403 - the tests themselves
from tests.scenarios.naming import *  # noqa: F403
from tests.scenarios.networks import *  # noqa: F403
from tests.scenarios.phases import *  # noqa: F403
from tests.scenarios.refusing import *  # noqa: F403
from tests.scenarios.waiting import *  # noqa: F403

pytestmark = pytest.mark.xdist_group("sim")
