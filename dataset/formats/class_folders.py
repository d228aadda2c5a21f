"""A folder per class, Atypical/*.png and Normal/*.png, is a dataset of ready-made patches; the
folders' names are the classes."""

from dataset.formats.cells import IMAGE_SUFFIXES, Table, canonical, image_name, text


def recognises(folder):
    return len(_folders(folder)) > 1


def _folders(folder):
    """{subfolder that holds images: their paths}, sorted."""
    folders = {}
    for subfolder in sorted(folder.iterdir()):
        if subfolder.name.startswith(".") or not subfolder.is_dir():
            continue
        images = []
        for file in sorted(subfolder.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(subfolder).parts)
            if file.name.lower().endswith(IMAGE_SUFFIXES) and not hidden and file.is_file():
                images.append(file)
        if images:
            folders[subfolder] = images
    return folders


def read(folder):
    table = Table("folders", folder, kind="patches")
    for subfolder, images in _folders(folder).items():
        category = canonical(text(folder, subfolder.name, "a folder's name"))
        table.names[category] = subfolder.name
        for image in images:
            name = image_name(folder, image.relative_to(folder).as_posix())
            table.sizes[name] = None
            table.add_patch(image=name, category=category, title=name)
    return table
