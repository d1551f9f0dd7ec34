"""Finds the files of public Google Cloud Storage buckets through the JSON API."""

import base64
import urllib.parse
from pathlib import Path
from typing import Any

from openpi_flash_models.checkpoints.fetch import Fetcher, NotFoundError, RemoteFile, relative_path

PUBLIC_URL = "https://storage.googleapis.com"


class Bucket:
    """A bucket that anyone may read, at Google's service or an emulator's."""

    def __init__(self, fetcher: Fetcher, name: str, url: str = PUBLIC_URL) -> None:
        self.name = name
        self._fetcher = fetcher
        self._objects_url = f"{url.rstrip('/')}/storage/v1/b/{urllib.parse.quote(name, safe='')}/o"

    def find(self, name: str) -> RemoteFile | None:
        """The object of that name; None when there is none."""
        try:
            return self._file(self._fetcher.json(self._object_url(name)))
        except NotFoundError:
            return None

    def list(self, folder: str) -> dict[Path, RemoteFile]:
        """All objects below `folder`, by their paths relative to it.

        Raises:
            DownloadError: there is no such bucket, or an object's name leads out of the folder.
        """
        found: dict[Path, RemoteFile] = {}
        query = {"prefix": f"{folder}/", "fields": "items(name,size,md5Hash,generation),nextPageToken"}
        while True:
            page = self._fetcher.json(f"{self._objects_url}?{urllib.parse.urlencode(query)}")
            for item in page.get("items", []):
                if not item["name"].endswith("/"):  # an empty object that stands for a folder
                    found[relative_path(item["name"], f"{folder}/")] = self._file(item)
            if "nextPageToken" not in page:
                return found
            query["pageToken"] = page["nextPageToken"]

    def _file(self, item: dict[str, Any]) -> RemoteFile:
        generation = str(item.get("generation", "0"))
        url = f"{self._object_url(item['name'])}?alt=media&generation={generation}"
        # Objects that were uploaded in parts have no MD5.
        checksum = ("md5", base64.b64decode(item["md5Hash"]).hex()) if "md5Hash" in item else None
        return RemoteFile(url, int(item["size"]), generation, checksum)

    def _object_url(self, name: str) -> str:
        return f"{self._objects_url}/{urllib.parse.quote(name, safe='')}"
