//! Made-up files, and what is found in a directory.

use std::collections::BTreeMap;
use std::path::Path;

/// Files by their paths.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The files below `root`.
///
/// # Panics
/// If something there cannot be read, or has a name that is no text.
pub fn read_tree(root: &Path) -> Files {
    let mut files = Files::new();
    let mut rest = vec![root.to_owned()];
    while let Some(directory) = rest.pop() {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                rest.push(path);
            } else {
                let name = path.strip_prefix(root).expect("it is below the root");
                let name = name.to_str().expect("a name in UTF-8").to_owned();
                files.insert(name, std::fs::read(path).expect("its bytes"));
            }
        }
    }
    files
}
