"""Whether a Nova is one the driver fits is seen by signature, and told with every method that differs."""

from __future__ import annotations

import pytest

from virtgrid.openstack import fitting


class Driver:
    def moved(self, context: object, instance: object) -> None: ...

    def grown(self, instance: object, more: object) -> None: ...

    renamed = None


EXPECTED = {"moved": ("context", "instance"), "grown": ("instance",), "renamed": (), "gone": ("dest",)}


def test_what_fits_is_not_told() -> None:
    assert fitting.misfits(Driver, "Driver", {"moved": ("context", "instance")}) == []
    fitting.refuse_unless_fit("34.0.0", [])


def test_every_method_that_differs_is_told() -> None:
    assert fitting.misfits(Driver, "Driver", EXPECTED) == [
        "Driver.grown takes (instance, more), not (instance)",
        "Driver has no renamed",
        "Driver has no gone",
    ]


def test_an_unfit_nova_is_refused_by_its_version_with_a_way_out() -> None:
    with pytest.raises(
        ImportError, match=r"does not fit nova 99\.1: A has no b; A has no c\. .*compute_driver"
    ):
        fitting.refuse_unless_fit("99.1", ["A has no b", "A has no c"])
