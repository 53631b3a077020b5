# Takes this machine's folders out of the source files that PTX names: ours become csrc/cuda/<file>, the toolkit's headers
# their own names. nvcc knows no option for it, and makes relative paths absolute.
#
#   cmake -DPTX=file.ptx -P relative_paths.cmake
file(READ ${PTX} text)
string(REGEX REPLACE "(\n[ \t]*\\.file[ \t]+[0-9]+[ \t]+)\"/[^\"\n]*/(csrc/cuda/[^\"\n/]+)\"" "\\1\"\\2\"" text "${text}")
string(REGEX REPLACE "(\n[ \t]*\\.file[ \t]+[0-9]+[ \t]+)\"/[^\"\n]*/([^\"\n/]+)\"" "\\1\"\\2\"" text "${text}")
file(WRITE ${PTX} "${text}")
