//! A link that does nothing, and notes what it was asked.

use super::*;

/// What the scheduler asked of the link, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Call {
    Begin,
    Progress { layer: u32, tokens: u32 },
    Restart,
    Offer { blocks: usize, tokens: u32 },
    Expect,
    Fetch { blocks: Vec<BlockId>, first_token: u32 },
    Release,
    Abort,
}

#[derive(Default)]
pub(super) struct FakeLink(Mutex<Vec<Call>>);

impl FakeLink {
    fn note(&self, call: Call) {
        self.0.lock().unwrap().push(call);
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl KvLink for FakeLink {
    fn offer(&self, offer: Offer) -> Result<TransferParams, KvError> {
        self.note(Call::Offer { blocks: offer.blocks[0].len(), tokens: offer.tokens });
        Ok(params(offer.transfer_id, offer.tokens))
    }

    fn begin(&self, _: Begin) -> Result<(), KvError> {
        self.note(Call::Begin);
        Ok(())
    }

    fn progress(&self, progress: Progress) {
        self.note(Call::Progress { layer: progress.layers.start, tokens: progress.tokens });
    }

    fn restart(&self, _: TransferId) {
        self.note(Call::Restart);
    }

    fn expect_early(&self, params: &EarlyParams, _: Prompt) -> Result<TransferHandle, KvError> {
        self.note(Call::Expect);
        Ok(TransferHandle { transfer_id: params.transfer_id })
    }

    fn expect(&self, params: &TransferParams) -> Result<TransferHandle, KvError> {
        self.note(Call::Expect);
        Ok(TransferHandle { transfer_id: params.pdlink.transfer_id })
    }

    fn fetch(&self, _: TransferHandle, mut blocks: Vec<Vec<BlockId>>, first_token: u32) {
        self.note(Call::Fetch { blocks: blocks.remove(0), first_token });
    }

    fn release(&self, _: TransferHandle) {
        self.note(Call::Release);
    }

    fn abort(&self, _: TransferId) {
        self.note(Call::Abort);
    }

    fn record(&self, _: TransferId) -> Option<TransferRecord> {
        None
    }

    fn records(&self) -> Vec<TransferRecord> {
        Vec::new()
    }

    fn status(&self) -> RuntimeStatus {
        unreachable!("the scheduler does not ask")
    }

    fn set_weight_version(&self, _: u64) {}
}
