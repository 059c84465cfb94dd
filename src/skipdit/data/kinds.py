"""The datasets of files by `data.kind`."""

from skipdit.data.clip_folder import ClipFolder
from skipdit.data.images import FashionMNIST, ImageFolder
from skipdit.data.pictures import PictureFolder
from skipdit.data.shards import ShardClips, ShardImages, ShardPictures

IMAGES = {"image_folder": ImageFolder, "fashion_mnist": FashionMNIST, "image_shards": ShardImages}
PICTURES = {"pictures": PictureFolder, "picture_shards": ShardPictures}
CLIPS = {"videos": ClipFolder, "frames": ClipFolder, "clip_shards": ShardClips}
FOLDERS = {**CLIPS, **PICTURES}  # what may have captions
