"""``Workspace``: a profile with its data, results and device."""

from collections.abc import Iterable
from dataclasses import dataclass

from cplib import datasets
from cplib.run import Run
from cplib.study import store
from cplib.study.jobs import Outcome, Planned, execute_all
from cplib.study.measures import lacking, out_of_reach
from cplib.study.paper import in_order
from cplib.study.profiles import Profile
from cplib.study.store import Places


class UsageError(ValueError):
    """Something asked for that is not there; the message is one line that names it."""


@dataclass(frozen=True)
class Workspace:
    """A profile with its data, results and device: what every notebook starts from.

    ``categories`` and ``seeds`` limit what is executed; tables show all that was measured.
    """

    profile: Profile
    categories: tuple[str, ...]
    places: Places
    seeds: int | None = None  # None: the profile's
    budget: float | None = None  # seconds
    engine: str = "local"
    device: str = "cpu"  # of training: on a Ray cluster not always that of ``places``

    @property
    def results(self):
        """The folder of results."""
        return self.places.results

    @property
    def shown(self) -> tuple[str, ...]:
        """The categories of the tables: the profile's, and those chosen."""
        return tuple(dict.fromkeys(self.profile.categories + self.categories))

    def load(self, category: str, split: str, size: int = 256) -> datasets.Images:
        """One category's images."""
        if self.places.data is None:
            raise UsageError("no data set at hand: set MVTEC_ROOT or pass --data DIR")
        return datasets.load(self.places.data, category, split, size)

    def finished(self, runs: Iterable[Run]) -> dict[Run, tuple[dict, dict]]:
        """Those of the runs whose results count, each with its record and its metrics."""
        return store.stock(runs, self.places).finished

    def missing(self, planned: Planned) -> Planned:
        """What is to be executed of it, for these categories and seeds.

        That is a run that is not finished, and a measure that is missing beside a finished one
        whose images and network are here.
        """
        stock, found = store.stock(planned, self.places), {}
        todo = {*stock.todo}
        for run, names in planned.items():
            if run.category not in self.categories or (self.seeds and run.seed >= self.seeds):
                continue
            if run in todo:
                found[run] = names
            elif run in stock.finished and (left := lacking(run, names, self.places)):
                found[run] = left
        return found

    def remarks(self, planned: Planned) -> list[str]:
        """Lines on stored numbers that are not as a new measurement would give them."""
        stock, lines = store.stock(planned, self.places), []
        for records, words in (
            (stock.outdated, "were measured on other images and do not count."),
            (stock.older, "were made with other random draws. They count until one is replaced."),
        ):
            if not records:
                continue
            categories = ", ".join(in_order({run.category for run in records}))
            trained = {run.training_id: record for run, record in records.items()}.values()
            hours = sum(record["train_seconds"] for record in trained) / 3600
            devices = " and ".join(sorted({record["device"] for record in trained}))
            lines.append(
                f"{len(records)} stored runs of {categories} {words} Measuring them anew takes "
                f"about {hours:.1f} hours of one device (as on {devices}) and replaces them. To "
                "keep both, set CPLIB_RESULTS to another folder."
            )
        left = [out_of_reach(run, planned[run], self.places) for run in stock.finished]
        if names := sorted({name for part in left for name in part}):
            lines.append(
                f"Records of {', '.join(names)} are missing or were made with other constants, and "
                f"the networks of these {sum(map(bool, left))} runs are not here. Such a run is "
                "trained and measured anew once its folder is removed."
            )
        return lines

    def execute(self, todo: Planned) -> list[Outcome]:
        """Execute runs and measures with this workspace's data, device and budget."""
        if todo and self.places.data is None:
            raise UsageError(f"{len(todo)} runs need data: set MVTEC_ROOT or pass --data DIR")
        places = self.places._replace(device=self.device)
        return execute_all(todo, places, budget=self.budget, engine=self.engine)

    def complete(self, planned: Planned, notebook: str) -> None:
        """Execute what is missing where the profile is small; elsewhere, with data, say how to."""
        todo = self.missing(planned)
        for line in self.remarks(planned):
            print(line)
        if todo and self.profile.small:
            for outcome in self.execute(todo):
                if outcome.state != "done":
                    print(f"{outcome.run.id}: {outcome.state}, {outcome.message}")
        elif todo and self.places.data:
            command = f"./run_all.sh --profile {self.profile.name} --data DIR --only 02,{notebook}"
            print(f"{len(todo)} runs are not measured yet: {command}")
