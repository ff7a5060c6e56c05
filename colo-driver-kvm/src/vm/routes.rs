//! Which message each line of the interrupt controller sends, and which addresses ring doorbells.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::device::pci::{Doorbells, Message, MessageRoutes};

/// Lines of the I/O APIC; lines of messages come behind them.
pub(super) const FIRST_MESSAGE: u32 = 24;
/// Lines of the two PICs.
const PIC_LINES: u32 = 16;

/// KVM's routing table, which can only be replaced as a whole.
#[derive(Debug)]
pub(super) struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Vec<kvm_irq_routing_entry>>,
}

impl Routes {
    /// The lines as KVM makes them with its interrupt controllers.
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        let mut table = Vec::new();
        for line in 0..FIRST_MESSAGE {
            table.push(chip(line, KVM_IRQCHIP_IOAPIC, line));
            if line < PIC_LINES {
                let half = if line < PIC_LINES / 2 {
                    KVM_IRQCHIP_PIC_MASTER
                } else {
                    KVM_IRQCHIP_PIC_SLAVE
                };
                table.push(chip(line, half, line % (PIC_LINES / 2)));
            }
        }
        Self {
            vm,
            table: Mutex::new(table),
        }
    }
}

fn chip(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl MessageRoutes for Routes {
    fn route(&self, messages: &[(u32, Message)]) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for &(gsi, what) in messages {
            table.retain(|entry| entry.gsi != gsi);
            table.push(message(gsi, what));
        }
        let set = KvmIrqRouting::from_entries(&table)
            .map_err(|error| format!("{error:?}"))
            .and_then(|table| {
                let set = self.vm.set_gsi_routing(&table);
                set.map_err(|error| error.to_string())
            });
        if let Err(error) = set {
            // The guest asked for a message that KVM cannot send; it gets none.
            tracing::debug!(%error, ?messages, "KVM_SET_GSI_ROUTING");
        }
    }
}

/// KVM as the one who hears writes to doorbells.
#[derive(Debug)]
pub(super) struct Rings(pub(super) Arc<VmFd>);

impl Doorbells for Rings {
    fn ring_at(&self, fd: &EventFd, addr: u64) {
        let at = IoEventAddress::Mmio(addr);
        if let Err(error) = self.0.register_ioevent(fd, &at, NoDatamatch) {
            // Each notification is an exit then, which is slower and no less right.
            tracing::debug!(%error, addr, "KVM_IOEVENTFD");
        }
    }

    fn silence(&self, fd: &EventFd, addr: u64) {
        let at = IoEventAddress::Mmio(addr);
        // Fails only if it was refused before.
        let _refused = self.0.unregister_ioevent(fd, &at, NoDatamatch);
    }
}
