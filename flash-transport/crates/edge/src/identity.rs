//! What makes an edge the same after a restart: its certificate, and the keys that let clients notice the restart.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use openpi_flash_quic::tls::Certified;
use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{FlockOperation, flock};

use crate::EdgeError;

const CERTIFICATE: &str = "edge-cert.pem";
const PRIVATE_KEY: &str = "edge-key.pem";
const KEYS: &str = "edge-quic.key";

/// 64 bytes that sign stateless resets, and 8 that mark connection ids as this server's.
///
/// With both kept, a restarted server tells a client at its next packet that the connection is gone; otherwise the
/// client would find out by silence.
const RESET_KEY_BYTES: usize = 64;
const KEYS_BYTES: usize = RESET_KEY_BYTES + 8;

/// Certificate and keys of an edge.
#[derive(Clone)]
pub struct Identity {
    /// Shown to clients.
    pub certified: Certified,
    pub(crate) reset_key: [u8; RESET_KEY_BYTES],
    pub(crate) connection_id_key: u64,
}

impl Identity {
    /// The identity kept in a folder, which is made where there is none.
    ///
    /// Without `certified` it has a self-signed certificate for `names`, made at the first start.
    pub fn load_or_create(folder: &Path, certified: Option<Certified>, names: &[String]) -> Result<Self, EdgeError> {
        fs::create_dir_all(folder).map_err(|error| problem(folder, &error))?;
        // Of two edges that start at once in one folder, one makes what both have.
        let lock = File::open(folder).map_err(|error| problem(folder, &error))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|error| problem(folder, &error))?;
        let certified = match certified {
            Some(certified) => certified,
            None => self_signed(folder, names)?,
        };
        let path = folder.join(KEYS);
        if !path.exists() {
            let mut keys = [0; KEYS_BYTES];
            SystemRandom::new().fill(&mut keys).map_err(|_| problem(&path, &"no randomness".to_owned()))?;
            write(&path, &keys)?;
        }
        let keys = fs::read(&path).map_err(|error| problem(&path, &error))?;
        let Ok(keys) = <[u8; KEYS_BYTES]>::try_from(keys) else {
            return Err(problem(&path, &format!("not {KEYS_BYTES} bytes; delete it and start again")));
        };
        let (mut reset_key, mut connection_id_key) = ([0; RESET_KEY_BYTES], [0; 8]);
        reset_key.copy_from_slice(&keys[..RESET_KEY_BYTES]);
        connection_id_key.copy_from_slice(&keys[RESET_KEY_BYTES..]);
        Ok(Self { certified, reset_key, connection_id_key: u64::from_be_bytes(connection_id_key) })
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.certified.fmt(f)
    }
}

fn self_signed(folder: &Path, names: &[String]) -> Result<Certified, EdgeError> {
    let (certificate, key) = (folder.join(CERTIFICATE), folder.join(PRIVATE_KEY));
    if !certificate.exists() || !key.exists() {
        let made = rcgen::generate_simple_self_signed(names).map_err(|error| problem(&certificate, &error))?;
        write(&key, made.signing_key.serialize_pem().as_bytes())?;
        write(&certificate, made.cert.pem().as_bytes())?;
    }
    Ok(Certified::load(&certificate, &key)?)
}

/// Writes a file that only its owner can read, whole or not at all.
fn write(path: &Path, content: &[u8]) -> Result<(), EdgeError> {
    let part = path.with_extension("part");
    let written = || -> io::Result<()> {
        let _ = fs::remove_file(&part);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    written().map_err(|error| problem(path, &error))
}

fn problem(path: &Path, problem: &impl ToString) -> EdgeError {
    EdgeError::File { path: path.into(), problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn edges_that_start_at_once_have_one_identity() {
        let folder = tempfile::tempdir().unwrap();
        let load = || Identity::load_or_create(folder.path(), None, &["localhost".into()]).unwrap();
        let identities = thread::scope(|scope| {
            let edges: Vec<_> = (0..8).map(|_| scope.spawn(load)).collect();
            edges.into_iter().map(|edge| edge.join().unwrap()).collect::<Vec<_>>()
        });
        let facts = |identity: &Identity| (identity.certified.fingerprint(), identity.reset_key);
        assert!(identities.iter().all(|identity| facts(identity) == facts(&identities[0])));
    }
}
