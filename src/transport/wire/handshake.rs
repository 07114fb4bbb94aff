//! Both ends of a data connection prove that they know the run's secret before anything else is said.
//!
//! ```text
//! client: magic, version, which export, nonce
//! server: magic, version, nonce, proof over all three
//! client: proof over all three
//! server: magic
//! ```
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::socket::{Patience, Socket};
use crate::security::{NONCE_BYTES, PROOF_BYTES, Secret, nonce, prove, proves};
use crate::transport::TransportError;

const MAGIC: [u8; 4] = *b"PDLD";
const VERSION: u16 = 1;
const HELLO_BYTES: usize = 4 + 2;
const SERVER_PURPOSE: &str = "pdlink data server";
const CLIENT_PURPOSE: &str = "pdlink data client";

/// Names one transport of one process. A connection meant for a process that used the port before is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::transport) struct ExportId([u8; 16]);

impl ExportId {
    pub(in crate::transport) fn random() -> Self {
        Self(rand::random())
    }
}

/// Fails once `deadline` has passed.
pub(in crate::transport) fn until(deadline: Instant, peer: &str) -> impl Fn(Duration) -> Result<(), TransportError> {
    move |_| {
        if Instant::now() < deadline {
            return Ok(());
        }
        Err(TransportError::io("handshake", peer, std::io::Error::from(std::io::ErrorKind::TimedOut)))
    }
}

/// The connecting side.
pub(in crate::transport) fn greet(
    socket: &Socket,
    export: ExportId,
    secret: &Secret,
    deadline: Instant,
) -> Result<(), TransportError> {
    let patience = until(deadline, socket.peer());
    let ours = draw(socket)?;
    socket.write_all(&[&hello()[..], &export.0, &ours].concat(), &patience)?;
    read_hello(socket, &patience)?;
    let theirs: [u8; NONCE_BYTES] = read(socket, &patience)?;
    let proof: [u8; PROOF_BYTES] = read(socket, &patience)?;
    let transcript: [&[u8]; 3] = [&export.0, &ours, &theirs];
    if !proves(secret, SERVER_PURPOSE, &transcript, &proof) {
        return Err(TransportError::Unauthenticated { peer: socket.peer().to_owned() });
    }
    socket.write_all(&prove(secret, CLIENT_PURPOSE, &transcript), &patience)?;
    if read::<4>(socket, &patience)? != MAGIC {
        return Err(protocol(socket, "it did not welcome us".to_owned()));
    }
    Ok(())
}

/// The listening side.
pub(in crate::transport) fn welcome(
    socket: &Socket,
    export: ExportId,
    secret: &Secret,
    deadline: Instant,
) -> Result<(), TransportError> {
    let patience = until(deadline, socket.peer());
    read_hello(socket, &patience)?;
    let asked = ExportId(read(socket, &patience)?);
    let theirs: [u8; NONCE_BYTES] = read(socket, &patience)?;
    if asked != export {
        return Err(protocol(socket, "it looks for another process".to_owned()));
    }
    let ours = draw(socket)?;
    let transcript: [&[u8]; 3] = [&export.0, &theirs, &ours];
    let proof = prove(secret, SERVER_PURPOSE, &transcript);
    socket.write_all(&[&hello()[..], &ours, &proof].concat(), &patience)?;
    let proof: [u8; PROOF_BYTES] = read(socket, &patience)?;
    if !proves(secret, CLIENT_PURPOSE, &transcript, &proof) {
        return Err(TransportError::Unauthenticated { peer: socket.peer().to_owned() });
    }
    socket.write_all(&MAGIC, &patience)
}

fn hello() -> [u8; HELLO_BYTES] {
    let [a, b, c, d] = MAGIC;
    let [low, high] = VERSION.to_le_bytes();
    [a, b, c, d, low, high]
}

fn read_hello(socket: &Socket, patience: Patience) -> Result<(), TransportError> {
    // The magic alone first: a stranger that says four bytes and waits is told by them.
    let magic: [u8; 4] = read(socket, patience)?;
    if magic != MAGIC {
        return Err(protocol(socket, format!("it began with {magic:02x?}, which is not pdlink's data protocol")));
    }
    let version = u16::from_le_bytes(read(socket, patience)?);
    if version != VERSION {
        return Err(protocol(socket, format!("it speaks v{version}, this build v{VERSION}; upgrade the older side")));
    }
    Ok(())
}

fn read<const N: usize>(socket: &Socket, patience: Patience) -> Result<[u8; N], TransportError> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes, patience)?;
    Ok(bytes)
}

fn draw(socket: &Socket) -> Result<[u8; NONCE_BYTES], TransportError> {
    nonce().map_err(|error| protocol(socket, error.to_string()))
}

fn protocol(socket: &Socket, what: String) -> TransportError {
    TransportError::Protocol { peer: socket.peer().to_owned(), what }
}
