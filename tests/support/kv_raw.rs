//! Ends of a KV link that say what a test has them say.
#![allow(dead_code, unreachable_pub, reason = "shared by crates of which each uses its part")]

use std::sync::{Arc, Mutex};

use pdlink::config::{KvSendType, Role};
use pdlink::control::{
    Connection, ControlError, Hello, Identity, Inbound, Liveness, Part, Sink, VERSIONS, connection, from_body, open,
    serve, to_body,
};
use pdlink::kv::{
    Basis, CheckedInfo, Claim, ParamsMaker, PeerInfo, RankCard, ToDecode, ToPrefill, TransferId, TransferParams,
};
use pdlink::security::Secret;
use pdlink::transport::{BoardAt, Offer};

use super::kv_cache::Cache;
use super::kv_worker::{PATIENCE, Worker};

const LIVENESS: Liveness = Liveness { ping_interval: PATIENCE, peer_timeout: PATIENCE.saturating_mul(2) };
const INCARNATION: u64 = 1;

fn identity(role: Role, cache: &Cache, board: Option<BoardAt>, offers: Vec<Offer>) -> Identity {
    let (geometry, map) = (cache.layout.geometry().clone(), cache.layout.map().clone());
    let payload = to_body(&PeerInfo { geometry, map, offers, send_type: KvSendType::Get, board }).to_vec();
    let hello = Hello { part: Part::Engine, engine_id: "raw".to_owned(), incarnation: INCARNATION, role, payload };
    Identity { secret: Secret::loopback(), versions: VERSIONS, hello, timeout: PATIENCE }
}

/// A decode worker that proves the secret and then does not keep to the protocol.
pub struct RawDecode {
    pub connection: Connection,
    /// What prefill says of itself.
    pub info: CheckedInfo,
    inbound: tokio::sync::mpsc::UnboundedReceiver<Inbound>,
    _driver: tokio::task::JoinSet<()>,
}

impl RawDecode {
    /// Says of itself what is true of `worker`.
    pub async fn connect(prefill: &Worker, worker: &Worker) -> Self {
        let identity = identity(Role::Decode, &worker.cache, None, Vec::new());
        let mut stream = tokio::net::TcpStream::connect(prefill.runtime.address()).await.unwrap();
        let (hello, buffer) = open(&mut stream, &identity, "prefill").await.unwrap();
        let (sender, inbound) = tokio::sync::mpsc::unbounded_channel();
        let sink = move |_: &Connection| -> Sink { Box::new(move |inbound| drop(sender.send(inbound))) };
        let (connection, driver) = connection(stream, buffer, "prefill".to_owned(), LIVENESS, sink);
        let mut drivers = tokio::task::JoinSet::new();
        drivers.spawn(driver);
        let info = PeerInfo::read(&hello.payload).unwrap();
        Self { connection, info, inbound, _driver: drivers }
    }

    pub fn say(&self, message: &ToPrefill) {
        self.connection.notify(to_body(message)).unwrap();
    }

    pub async fn hear(&mut self) -> Result<ToDecode, ControlError> {
        match tokio::time::timeout(PATIENCE, self.inbound.recv()).await.unwrap().unwrap() {
            Inbound::Notice(message) => Ok(from_body(&message.body).unwrap()),
            Inbound::Request(..) => panic!("a request"),
            Inbound::Closed(error) => Err(error),
        }
    }
}

/// The claim that belongs to an offer of `prefill`.
pub fn claim_of(prefill: &Worker, params: &TransferParams) -> ToPrefill {
    ToPrefill::Claim(Claim {
        transfer_id: params.pdlink.transfer_id,
        basis: Basis::Params {
            incarnation: prefill.runtime.incarnation(),
            geometry_digest: params.pdlink.geometry_digest,
            weight_version: Some(1),
        },
        decode_weight_version: 1,
        tokens: params.remote_num_tokens,
    })
}

/// A prefill worker that one decode worker connects to.
pub struct RawPrefill {
    params: ParamsMaker,
    connection: Arc<Mutex<Option<Connection>>>,
    inbound: tokio::sync::mpsc::UnboundedReceiver<Inbound>,
    _server: tokio::task::JoinSet<()>,
}

impl RawPrefill {
    /// One that holds `cache`, offers these ways to it, and has its words there.
    pub async fn start(cache: &Cache, offers: Vec<Offer>, board: BoardAt) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let card = RankCard {
            engine_id: "raw".to_owned(),
            rank: 0,
            tp_size: 1,
            endpoint: listener.local_addr().unwrap().to_string(),
            incarnation: INCARNATION,
            geometry_digest: cache.layout.geometry().digest(),
            weight_version: 1,
        };
        let (sender, inbound) = tokio::sync::mpsc::unbounded_channel();
        let connected: Arc<Mutex<Option<Connection>>> = Arc::default();
        let (identity, kept) = (identity(Role::Prefill, cache, Some(board), offers), Arc::clone(&connected));
        let welcome = move |_: Hello, connection: &Connection| -> Sink {
            *kept.lock().unwrap() = Some(connection.clone());
            let sender = sender.clone();
            Box::new(move |inbound| drop(sender.send(inbound)))
        };
        let mut server = tokio::task::JoinSet::new();
        server.spawn(serve(listener, Arc::new(identity), LIVENESS, Arc::new(welcome)));
        let params = ParamsMaker::new(vec![card], Secret::loopback()).unwrap();
        Self { params, connection: connected, inbound, _server: server }
    }

    pub fn params(&self, blocks: &[pdlink::kv::BlockId], tokens: u32) -> TransferParams {
        self.params.params(TransferId::random(), "cmpl-test".to_owned(), vec![blocks.to_vec()], tokens)
    }

    pub fn say(&self, message: &ToDecode) {
        let connection = self.connection.lock().unwrap();
        connection.as_ref().expect("decode has connected").notify(to_body(message)).unwrap();
    }

    pub async fn hear(&mut self) -> ToPrefill {
        loop {
            let heard = match tokio::time::timeout(PATIENCE, self.inbound.recv()).await.unwrap().unwrap() {
                Inbound::Notice(message) => from_body(&message.body).unwrap(),
                Inbound::Request(..) => panic!("a request"),
                Inbound::Closed(error) => panic!("decode has gone: {error}"),
            };
            // Of no concern to any test.
            if !matches!(heard, ToPrefill::Renew(_)) {
                return heard;
            }
        }
    }
}
