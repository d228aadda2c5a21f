"""What of a file of candidates can be scored."""

from common import UserError
from onnx_model.reading import SlideReader


class Plan:
    """The cells that can be scored, in the arrays that `reading.score` takes.

    rows [n]: their candidates · which [n]: index into `readers` · x, y [n]: level-0 px · problems:
    what cannot be scored, a line each"""

    def __init__(self):
        self.rows, self.which, self.x, self.y = [], [], [], []
        self.readers, self.problems = [], []

    def add_reader(self, metadata, path, mpp):
        """The index of a new reader; None if the image cannot be read."""
        try:
            self.readers.append(SlideReader(metadata, path, mpp))
        except (UserError, OSError, ValueError) as error:
            text = str(error)
            if str(path) not in text:
                text = f"{path}: cannot be read ({text})"
            self.problems.append(text)
            return None
        return len(self.readers) - 1

    def add_cell(self, row, reader, x, y):
        self.rows.append(row)
        self.which.append(reader)
        self.x.append(x)
        self.y.append(y)

    def scales(self):
        """{file of a slide: its µm/px or None}."""
        return {reader.slide: reader.mpp for reader in self.readers}


def plan(candidates, images, missing, metadata, mpp):
    """What of the candidates can be scored → Plan.

    images, missing  from `find_images`
    mpp              µm/px of the slides; None: as their files say
    """
    job = Plan()
    job.problems += [f"{path}: no such file" for path in missing]
    readers = {None: None, **dict.fromkeys(missing)}
    for row, path in enumerate(images):
        if path not in readers:
            readers[path] = job.add_reader(metadata, path, mpp)
        if readers[path] is None:
            continue
        reader = job.readers[readers[path]]
        x, y = float(candidates.x[row]), float(candidates.y[row])
        if candidates.unit == "mm":  # millimetres
            if reader.mpp is None:
                raise UserError(
                    f"{path}: its µm/px is unknown, and the candidates are in millimetres; give "
                    "--mpp"
                )
            x, y = x * 1000 / reader.mpp, y * 1000 / reader.mpp
        if reader.outside(x, y):
            job.problems.append(
                f"candidate {candidates.ids[row]} at ({x:g}, {y:g}) lies outside {path.name} "
                f"({reader.extent})"
            )
            continue
        job.add_cell(row, readers[path], x, y)
    return job


def in_one_line(problems):
    """The first of some problems, and how many there are beside it."""
    if len(problems) == 1:
        return problems[0]
    return f"{problems[0]} (and {len(problems) - 1} more like this)"
