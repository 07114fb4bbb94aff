//! How a control connection begins: who speaks what, and who knows the run's secret.
//!
//! ```text
//! client                                     server
//!   PDLK │ min, max version │ nonce   ──►
//!                                     ◄──    PDLK │ min, max version          (then hangs up if none is common)
//!                                     ◄──    nonce │ proof over both preambles
//!   proof over both preambles         ──►
//!   Hello                             ──►
//!                                     ◄──    Hello
//! ```
//!
//! Each side proves first that it knows the secret, over the other's fresh nonce, and says who it is only to a peer that
//! has proved the same. The two proofs differ in purpose, so neither can be echoed.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::{FRAME_BYTES_MAX, Frame, FrameBuffer, WireError, from_body, to_body};
use super::{ControlError, Part, Role};
use crate::security::{NONCE_BYTES, PROOF_BYTES, Secret, nonce, prove, proves};

const MAGIC: [u8; 4] = *b"PDLK";
const CLIENT: &str = "control client";
const SERVER: &str = "control server";

/// Control protocol versions that a build speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    pub min: u16,
    pub max: u16,
}

/// What this build speaks.
pub const VERSIONS: Versions = Versions { min: 7, max: 7 };

/// Who is at one end, said after both have proved that they belong to the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub part: Part,
    pub engine_id: String,
    /// Drawn anew at each start of an engine's runtime (KV-8).
    pub incarnation: u64,
    pub role: Role,
    /// For the layer above: what an engine's runtime tells its peers about its memory.
    pub payload: Vec<u8>,
}

/// What one side brings to every handshake.
#[derive(Debug, Clone)]
pub struct Identity {
    pub secret: Secret,
    pub versions: Versions,
    pub hello: Hello,
    /// How long the whole handshake may take.
    pub timeout: Duration,
}

/// Opens as the client; `peer` names the other side in errors. Bytes that came after the peer's hello are in the buffer.
pub async fn open<S>(stream: &mut S, identity: &Identity, peer: &str) -> Result<(Hello, FrameBuffer), ControlError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let timed_out =
        |_| ControlError::TimedOut { peer: peer.to_owned(), doing: "shaking hands", within: identity.timeout };
    tokio::time::timeout(identity.timeout, Side { stream, identity, peer }.client()).await.map_err(timed_out)?
}

/// Answers as the server.
pub async fn accept<S>(stream: &mut S, identity: &Identity, peer: &str) -> Result<(Hello, FrameBuffer), ControlError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let timed_out =
        |_| ControlError::TimedOut { peer: peer.to_owned(), doing: "shaking hands", within: identity.timeout };
    tokio::time::timeout(identity.timeout, Side { stream, identity, peer }.server()).await.map_err(timed_out)?
}

struct Side<'a, S> {
    stream: &'a mut S,
    identity: &'a Identity,
    peer: &'a str,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Side<'_, S> {
    async fn client(mut self) -> Result<(Hello, FrameBuffer), ControlError> {
        let ours = self.preamble(&self.fresh_nonce()?);
        self.send(&ours).await?;
        let mut theirs = Vec::from(self.versions_of_peer().await?);
        theirs.extend(self.receive::<NONCE_BYTES>().await?);
        let proof = self.receive::<PROOF_BYTES>().await?;
        if !proves(&self.identity.secret, SERVER, &[&ours, &theirs], &proof) {
            return Err(ControlError::WrongSecret { peer: self.peer.to_owned() });
        }
        self.send(&prove(&self.identity.secret, CLIENT, &[&ours, &theirs])).await?;
        self.send_hello().await?;
        self.receive_hello().await
    }

    async fn server(mut self) -> Result<(Hello, FrameBuffer), ControlError> {
        let nonce = self.fresh_nonce()?;
        let ours = self.preamble(&nonce);
        let spoken = self.versions_of_peer().await;
        if let Ok(_) | Err(ControlError::Version { .. }) = spoken {
            // Also said to a peer of another version, so that its error can name both sides.
            self.send(&ours[..8]).await?;
        }
        let mut theirs = Vec::from(spoken?);
        theirs.extend(self.receive::<NONCE_BYTES>().await?);
        let proof = prove(&self.identity.secret, SERVER, &[&theirs, &ours]);
        self.send(&[&nonce[..], &proof].concat()).await?;
        let answer = self.receive::<PROOF_BYTES>().await?;
        if !proves(&self.identity.secret, CLIENT, &[&theirs, &ours], &answer) {
            return Err(ControlError::WrongSecret { peer: self.peer.to_owned() });
        }
        let received = self.receive_hello().await?;
        self.send_hello().await?;
        Ok(received)
    }

    fn fresh_nonce(&self) -> Result<[u8; NONCE_BYTES], ControlError> {
        nonce().map_err(|error| ControlError::Refused { peer: "this host's kernel".to_owned(), why: error.to_string() })
    }

    fn preamble(&self, nonce: &[u8; NONCE_BYTES]) -> Vec<u8> {
        let Versions { min, max } = self.identity.versions;
        [&MAGIC[..], &min.to_le_bytes(), &max.to_le_bytes(), nonce].concat()
    }

    /// Reads magic and versions, and refuses what we cannot speak with.
    async fn versions_of_peer(&mut self) -> Result<[u8; 8], ControlError> {
        // The magic alone first: a stray HTTP client is told from a peer without waiting for more bytes.
        let magic = self.receive::<4>().await?;
        if magic != MAGIC {
            let began = magic.escape_ascii().to_string();
            return Err(ControlError::BadMagic { peer: self.peer.to_owned(), began });
        }
        let [a, b, c, d] = self.receive::<4>().await?;
        let (theirs_min, theirs_max) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let Versions { min, max } = self.identity.versions;
        if theirs_min > theirs_max || theirs_max < min || theirs_min > max {
            let (ours_min, ours_max) = (min, max);
            return Err(ControlError::Version {
                peer: self.peer.to_owned(),
                theirs_min,
                theirs_max,
                ours_min,
                ours_max,
            });
        }
        Ok([magic[0], magic[1], magic[2], magic[3], a, b, c, d])
    }

    async fn send_hello(&mut self) -> Result<(), ControlError> {
        let frame = Frame::Hello(to_body(&self.identity.hello)).encode().map_err(|error| self.unreadable(&error))?;
        self.send(&frame).await
    }

    async fn receive_hello(&mut self) -> Result<(Hello, FrameBuffer), ControlError> {
        let mut buffer = FrameBuffer::default();
        loop {
            match buffer.next_frame().map_err(|error| self.unreadable(&error))? {
                Some(Frame::Hello(body)) => {
                    let hello = from_body(&body).map_err(|error| self.unreadable(&error))?;
                    return Ok((hello, buffer));
                }
                Some(_) => return Err(self.unreadable(&WireError::Malformed("no hello where one is due".to_owned()))),
                None => {}
            }
            let read = self.stream.read_buf(buffer.space()).await;
            if read.map_err(|error| self.closed(&error))? == 0 {
                return Err(ControlError::HungUp { peer: self.peer.to_owned() });
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ControlError> {
        self.stream.write_all(bytes).await.map_err(|error| self.closed(&error))
    }

    async fn receive<const N: usize>(&mut self) -> Result<[u8; N], ControlError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.map_err(|error| self.closed(&error))?;
        Ok(bytes)
    }

    fn closed(&self, error: &std::io::Error) -> ControlError {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let peer = self.peer.to_owned();
        if matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe) {
            ControlError::HungUp { peer }
        } else {
            ControlError::Closed { peer, why: error.to_string() }
        }
    }

    fn unreadable(&self, error: &WireError) -> ControlError {
        unreadable(self.peer, error)
    }
}

/// A frame's error, with the peer's name.
pub(super) fn unreadable(peer: &str, error: &WireError) -> ControlError {
    let peer = peer.to_owned();
    match error {
        WireError::Oversize { bytes } => ControlError::Oversize { peer, bytes: *bytes, max: FRAME_BYTES_MAX as u64 },
        WireError::Malformed(why) => ControlError::Malformed { peer, why: why.clone() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(secret: &Secret, versions: Versions, name: &str) -> Identity {
        let hello = Hello {
            part: Part::Engine,
            engine_id: name.to_owned(),
            incarnation: 7,
            role: Role::Both,
            payload: vec![1, 2, 3],
        };
        Identity { secret: secret.clone(), versions, hello, timeout: Duration::from_secs(5) }
    }

    async fn shake(client: &Identity, server: &Identity) -> (Result<Hello, ControlError>, Result<Hello, ControlError>) {
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        // Each end is dropped when its side is done, as sockets are.
        let opened = async {
            let opened = open(&mut near, client, "server").await;
            drop(near);
            opened
        };
        let accepted = async {
            let accepted = accept(&mut far, server, "client").await;
            drop(far);
            accepted
        };
        let (opened, accepted) = tokio::join!(opened, accepted);
        (opened.map(|(hello, _)| hello), accepted.map(|(hello, _)| hello))
    }

    #[tokio::test]
    async fn two_parts_of_one_run_learn_each_others_hello() {
        let secret = Secret::generate().unwrap();
        let (client, server) = (identity(&secret, VERSIONS, "a"), identity(&secret, VERSIONS, "b"));
        let (opened, accepted) = shake(&client, &server).await;
        assert_eq!(opened.unwrap(), server.hello);
        assert_eq!(accepted.unwrap(), client.hello);
    }

    #[tokio::test]
    async fn another_secret_is_named_on_the_client_and_never_let_in_by_the_server() {
        let (one, two) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        let (opened, accepted) = shake(&identity(&one, VERSIONS, "a"), &identity(&two, VERSIONS, "b")).await;
        assert_eq!(opened, Err(ControlError::WrongSecret { peer: "server".to_owned() }));
        assert_eq!(accepted, Err(ControlError::HungUp { peer: "client".to_owned() }));
    }

    #[tokio::test]
    async fn a_client_that_cannot_prove_the_secret_is_refused() {
        let secret = Secret::generate().unwrap();
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        let server = identity(&secret, VERSIONS, "b");
        let impostor = async {
            let [min, max] = [VERSIONS.min, VERSIONS.max].map(u16::to_le_bytes);
            near.write_all(&[&MAGIC[..], &min, &max, &[0; 32], &[0; 32]].concat()).await.unwrap();
            let mut answer = [0; 72];
            near.read_exact(&mut answer).await.unwrap();
            near
        };
        let (_near, accepted) = tokio::join!(impostor, accept(&mut far, &server, "client"));
        assert_eq!(accepted.unwrap_err(), ControlError::WrongSecret { peer: "client".to_owned() });
    }

    #[tokio::test]
    async fn a_version_mismatch_names_both_sides_to_both() {
        let secret = Secret::generate().unwrap();
        let (old, new) = (Versions { min: 1, max: 2 }, Versions { min: 3, max: 4 });
        let (opened, accepted) = shake(&identity(&secret, old, "a"), &identity(&secret, new, "b")).await;
        assert!(matches!(opened, Err(ControlError::Version { theirs_min: 3, theirs_max: 4, ours_max: 2, .. })));
        let text = opened.unwrap_err().to_string();
        assert!(
            text.contains("v3 to v4") && text.contains("v1 to v2") && text.contains("upgrade the older side"),
            "{text}"
        );
        assert!(matches!(accepted, Err(ControlError::Version { theirs_min: 1, theirs_max: 2, ours_min: 3, .. })));
    }

    #[tokio::test]
    async fn garbage_is_named() {
        let server = identity(&Secret::loopback(), VERSIONS, "b");
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let refused = accept(&mut far, &server, "client").await.unwrap_err();
        assert_eq!(refused, ControlError::BadMagic { peer: "client".to_owned(), began: "GET ".to_owned() });
    }

    #[tokio::test]
    async fn silence_and_hanging_up_end_the_handshake() {
        let mut server = identity(&Secret::loopback(), VERSIONS, "b");
        server.timeout = Duration::from_millis(20);
        let (near, mut far) = tokio::io::duplex(1 << 16);
        assert!(matches!(accept(&mut far, &server, "client").await, Err(ControlError::TimedOut { .. })));
        drop(near);
        assert!(matches!(accept(&mut far, &server, "client").await, Err(ControlError::HungUp { .. })));
    }

    #[tokio::test]
    async fn an_oversized_hello_is_named() {
        let secret = Secret::generate().unwrap();
        let server = identity(&secret, VERSIONS, "b");
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        let client = async {
            let side = identity(&secret, VERSIONS, "a");
            let mut side = Side { stream: &mut near, identity: &side, peer: "server" };
            let ours = side.preamble(&[5; 32]);
            side.send(&ours).await.unwrap();
            let theirs = side.receive::<40>().await.unwrap();
            side.receive::<32>().await.unwrap();
            side.send(&prove(&secret, CLIENT, &[&ours, &theirs])).await.unwrap();
            side.send(&u32::MAX.to_le_bytes()).await.unwrap();
        };
        let ((), accepted) = tokio::join!(client, accept(&mut far, &server, "client"));
        assert!(matches!(accepted, Err(ControlError::Oversize { bytes: 4_294_967_295, .. })));
    }
}
