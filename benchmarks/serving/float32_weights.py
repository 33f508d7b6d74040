"""The model in float32, in the forms that the peers read: run by install_peers.py, on the interpreter of @peers.

float32_weights.py GGUF FOLDER   # writes FOLDER/model-f32.gguf and a Hugging Face directory, FOLDER/hf
"""

import os
import pathlib
import sys

import gguf
import torch
import transformers

# Written anew: what the writer counts by itself, and what says how the tensors are stored.
_OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_gguf(source, target):
    """A copy of a file with all its tensors in float32."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith(_OWN)}
    writer = gguf.GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for name, field in fields.items():
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hf(source, folder):
    """A Hugging Face directory of a file."""
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    del read.config.quantization_config  # it counts as quantised, which cannot be saved
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def main(source, folder):
    draft = folder / "draft.gguf"
    write_gguf(source, draft)
    write_hf(source, folder / "hf")
    os.replace(draft, folder / "model-f32.gguf")  # last: where it is, all is


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
