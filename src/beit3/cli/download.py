"""`beit3 download`: fetches files that were released with BEiT-3 and BEiT v2."""


def download(*names: str, to: str | None = None, base_url: str = "") -> None:
    """Download files released with BEiT-3 and BEiT v2; without a name, list them.

    ```
    beit3 download beit3_base_patch16_480_vqa beit3.spm
    beit3 predict beit3_base_patch16_480_vqa street.jpg "how many taxis?" --answers answers.txt
    ```

    A download that broke off goes on where it ended. Names without a path are looked for in the
    default directory, where `beit3.spm` serves all files.

    Args:
        names: Names of files, with or without .pth.
        to: The directory to write to, by default `released` in the cache directory.
        base_url: A mirror, to whose address `/` and the file's name are added.
    """
    from beit3.files import compute_sha256
    from beit3.weights.released import download_released, format_downloads

    if not names:
        print(*format_downloads(), sep="\n")
    for name in names:
        path = download_released(name, to, base_url=base_url)
        print(f"{path}  sha256 {compute_sha256(path)}")
