//! What a rank tells its scheduler, and how a scheduler makes `kv_transfer_params` from it.
//!
//! An engine may run one process for each tensor-parallel rank, each with a runtime of its own, and a scheduler process
//! with none. Each rank hands the scheduler its [`RankCard`]; from all of them the scheduler makes a [`ParamsMaker`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::params::hex64;
use super::{BlockId, PARAMS_VERSION, ParamsError, PdlinkParams, RankEndpoint, TransferParams};
use crate::control::TransferId;
use crate::security::Secret;

/// One rank of an engine, and where its KV is to be had. Travels as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankCard {
    pub engine_id: String,
    pub rank: u32,
    pub tp_size: u32,
    /// `host:port` of the control listener of the runtime that holds the rank.
    pub endpoint: String,
    #[serde(with = "hex64")]
    pub incarnation: u64,
    #[serde(with = "hex64")]
    pub geometry_digest: u64,
    pub weight_version: u64,
}

/// Makes the `kv_transfer_params` of one engine's transfers.
#[derive(Debug)]
pub struct ParamsMaker {
    engine_id: String,
    tp_size: u32,
    host: String,
    port: u16,
    ranks: Vec<RankEndpoint>,
    geometry_digest: u64,
    /// `None`: whoever makes parameters here hears of no new weights.
    weight_version: Option<AtomicU64>,
    secret: Secret,
}

impl ParamsMaker {
    /// For where no runtime is. `cards` are those of all ranks of one engine, in whatever order.
    pub fn new(mut cards: Vec<RankCard>, secret: Secret) -> Result<Self, ParamsError> {
        cards.sort_by_key(|card| card.rank);
        let first = cards.first().ok_or_else(|| ParamsError::Cards("there are none".to_owned()))?;
        let given: Vec<u32> = cards.iter().map(|card| card.rank).collect();
        if !given.iter().copied().eq(0..first.tp_size) {
            let why = format!("they are of ranks {given:?}, 0 to {} are wanted", first.tp_size - 1);
            return Err(ParamsError::Cards(why));
        }
        let told = |card: &RankCard| (card.engine_id.clone(), card.tp_size, card.geometry_digest, card.weight_version);
        if let Some(other) = cards.iter().find(|card| told(card) != told(first)) {
            let why = format!(
                "engine, number of ranks, geometry and weight version are {:?} on rank {} and {:?} on rank 0",
                told(other),
                other.rank,
                told(first)
            );
            return Err(ParamsError::Cards(why));
        }
        Ok(Self { weight_version: None, ..Self::of_some(&cards, secret)? })
    }

    /// For a runtime that holds perhaps not all ranks, and knows only its own.
    pub(super) fn of_some(cards: &[RankCard], secret: Secret) -> Result<Self, ParamsError> {
        let first = cards.first().ok_or_else(|| ParamsError::Cards("there are none".to_owned()))?;
        let address = first.endpoint.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let no_address = || ParamsError::Cards(format!("`{}` is no host:port", first.endpoint));
        let (host, port) = address.ok_or_else(no_address)?;
        let endpoint =
            |card: &RankCard| RankEndpoint { endpoint: card.endpoint.clone(), incarnation: card.incarnation };
        Ok(Self {
            engine_id: first.engine_id.clone(),
            tp_size: first.tp_size,
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            ranks: cards.iter().map(endpoint).collect(),
            geometry_digest: first.geometry_digest,
            weight_version: Some(AtomicU64::new(first.weight_version)),
            secret,
        })
    }

    /// The sealed parameters of one transfer. `blocks`: one list for each KV group.
    pub fn params(
        &self,
        transfer_id: TransferId,
        request_id: String,
        blocks: Vec<Vec<BlockId>>,
        tokens: u32,
    ) -> TransferParams {
        TransferParams {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_engine_id: self.engine_id.clone(),
            remote_request_id: request_id,
            remote_host: self.host.clone(),
            remote_port: self.port,
            remote_block_ids: blocks,
            tp_size: self.tp_size,
            remote_num_tokens: tokens,
            pdlink: PdlinkParams {
                version: PARAMS_VERSION,
                transfer_id,
                ranks: self.ranks.clone(),
                geometry_digest: self.geometry_digest,
                weight_version: self.weight_version.as_ref().map(|version| version.load(Relaxed)),
                seal: String::new(),
            },
        }
        .sealed(&self.secret)
    }

    /// From now on the engine's KV is of these weights (KV-5). To be told together with every rank's runtime.
    pub fn set_weight_version(&self, weight_version: u64) {
        if let Some(version) = &self.weight_version {
            version.store(weight_version, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(rank: u32) -> RankCard {
        RankCard {
            engine_id: "engine".to_owned(),
            rank,
            tp_size: 3,
            endpoint: format!("[::1]:{}", 7000 + rank),
            incarnation: u64::MAX - u64::from(rank),
            geometry_digest: 5,
            weight_version: 1,
        }
    }

    #[test]
    fn cards_of_all_ranks_make_parameters_that_name_each() {
        let secret = Secret::generate().unwrap();
        let relayed = |rank| serde_json::from_str(&serde_json::to_string(&card(rank)).unwrap()).unwrap();
        let maker = ParamsMaker::new([2, 0, 1].map(relayed).to_vec(), secret.clone()).unwrap();
        let params = maker.params(TransferId([1; 16]), "cmpl".to_owned(), vec![vec![BlockId(3)], vec![]], 7);
        params.check_seal(&secret).unwrap();
        assert_eq!((params.remote_host.as_str(), params.remote_port), ("::1", 7000));
        let named: Vec<_> = params.pdlink.ranks.iter().map(|rank| (rank.endpoint.as_str(), rank.incarnation)).collect();
        assert_eq!(named, [("[::1]:7000", u64::MAX), ("[::1]:7001", u64::MAX - 1), ("[::1]:7002", u64::MAX - 2)]);
        assert_eq!(TransferParams::parse(&params.to_json()).unwrap(), params);
        assert_eq!(params.pdlink.weight_version, None);
        let maker = ParamsMaker::of_some(&[card(0)], secret).unwrap();
        maker.set_weight_version(4);
        assert_eq!(maker.params(TransferId([1; 16]), String::new(), vec![], 7).pdlink.weight_version, Some(4));
    }

    #[test]
    fn cards_that_are_not_those_of_one_engine_are_refused() {
        let refused = |edit: fn(&mut Vec<RankCard>)| {
            let mut cards = vec![card(0), card(1), card(2)];
            edit(&mut cards);
            matches!(ParamsMaker::new(cards, Secret::loopback()), Err(ParamsError::Cards(_)))
        };
        assert!(refused(Vec::clear));
        assert!(refused(|cards| cards.truncate(2)));
        assert!(refused(|cards| cards[1].rank = 0));
        assert!(refused(|cards| cards[1].engine_id.clear()));
        assert!(refused(|cards| cards[1].geometry_digest = 6));
        assert!(refused(|cards| cards[2].weight_version = 2));
        assert!(refused(|cards| cards[0].endpoint = "nowhere".to_owned()));
    }
}
