"""Data sets: archives and files on disk, splits by a seed, images as rows of a matrix."""

# Names are imported as themselves, which exports them without writing each name twice.
from experiments.data.archive import DataError as DataError
from experiments.data.datasets import Dataset as Dataset
from experiments.data.datasets import DatasetName as DatasetName
from experiments.data.datasets import Source as Source
from experiments.data.datasets import Split as Split
from experiments.data.datasets import read as read
